"""What adapter and image-feature decoder share as models of the hub: huggingface_hub's mixin, files written whole, a model card."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin

from moma_lightning.files import write_beside

CARD = """---
{{ card_data }}
---

# {{ title }}

{{ details }}

Part of a MoMA (Song et al., ECCV 2024, {{ paper_url }}), trained with `moma_lightning`. Load it with the base models that it was trained on:

```python
{{ usage }}
```
"""


class PublishedModel(ModelHubMixin, library_name="moma_lightning", tags=["moma", "subject-driven-generation", "text-to-image"],
                     paper_url="https://arxiv.org/abs/2404.05674", model_card_template=CARD):
    """`save_pretrained`, `push_to_hub` and the card; subclasses give `_save_pretrained`, `describe` and `from_pretrained`."""

    def describe(self) -> dict[str, str]:
        """The card's `title`, `details` and `usage`."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, *, model_card_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write the model's files, and README.md where there is none, each beside and renamed.

        The mixin's own removes config.json first, so that a full disk would leave a folder of no use.
        """
        folder = Path(save_directory)
        self._save_pretrained(folder)
        if not (folder / "README.md").exists():
            card = self.generate_model_card(**(model_card_kwargs or {}))
            write_beside(folder / "README.md", lambda path: path.write_text(str(card)))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        return super().generate_model_card(*args, **(self.describe() | kwargs))
