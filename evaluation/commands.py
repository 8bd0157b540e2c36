"""What `python -m evaluation` can do. Imports nothing: usage comes at once."""

HELP = {
    "generate": "make the missing pictures",
    "score": "score the pictures; write scores.parquet, summary.json and table.md",
    "dreambooth": "generate, then score",
    "ablate": "one table of settings: add --config experiments/ablations/<axis>.yaml",
    "point": "one setting of MoMA (--moma.beta ...), scored and logged to wandb: what a sweep's agent runs",
    "masks": "is M_gen where the subject is: IoU with SAM at three mask strengths",
    "figures": "the paper's figures as PNG and SVG",
    "models": "names of the protocol's encoders, for `python -m moma_lightning fetch --models`",
    "report": "figures, report/index.html and report/grid.png; log to wandb",
}
