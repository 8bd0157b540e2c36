"""Numbers of the MoMA paper, for the reader's eye only: real DreamBooth, real encoders, full-size models."""

from evaluation import statistics

NOTE = "published, real DreamBooth, not comparable with mini"

#: Table 1: DINO, CLIP-T(c), CLIP-I, CLIP-T(t). 0.885 is printed in another column there; it is DreamBooth's CLIP-I.
TABLE_1: dict[str, tuple[float | None, ...]] = {
    "Real images": (0.774, None, 0.885, None),
    "Textual Inversion": (0.569, 0.255, 0.780, None),
    "Re-Imagen": (0.600, 0.270, 0.740, None),
    "IP-Adapter": (0.612, 0.330, 0.793, 0.319),
    "BLIP-Diffusion": (0.594, 0.300, 0.779, 0.271),
    "MoMA": (0.618, 0.348, 0.803, 0.335),
}
#: Table 3: strength of the masks. The CLIP-T(t) of .231 at .5 is printed so; between .335 and .322 it may be a misprint.
MASKING = {1.0: (0.618, 0.348, 0.803, 0.335), 0.5: (0.603, 0.322, 0.797, 0.231), 0.0: (0.575, 0.298, 0.788, 0.322)}
#: Table 4: strength of the subject features.
BETA = {1.0: (0.618, 0.348, 0.803, 0.335), 0.5: (0.591, 0.348, 0.788, 0.338), 0.0: (0.583, 0.349, 0.782, 0.319)}
#: By the name that an ablation's `published` has for them.
ABLATIONS = {"masking": MASKING, "beta": BETA}

assert all(len(row) == len(statistics.TABLE_1) for table in (TABLE_1, MASKING, BETA) for row in table.values())
