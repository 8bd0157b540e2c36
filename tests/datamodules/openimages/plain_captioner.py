"""A captioner without a model: its captions tell pictures apart, and that is all."""


class PlainCaptioner:
    def __init__(self, word: str):
        self.word = word

    def __call__(self, images):
        return [f"a {self.word} with {sum(image.resize((8, 8)).tobytes())} in it" for image in images]
