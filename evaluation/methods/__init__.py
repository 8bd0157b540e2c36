"""What can be evaluated. Importing this package is what makes the class names known to configs."""

from evaluation.methods.base import Method, Models, Reference
from evaluation.methods.diffusion import IpAdapter, Moma, TextOnly
from evaluation.methods.dreambooth_lora import DreamBoothLora
from evaluation.methods.given import Folder, RealImages
from evaluation.methods.pipelines import Pipeline
from evaluation.methods.stock_ip_adapter import StockIpAdapter
from evaluation.methods.textual_inversion import TextualInversion

__all__ = [
    "DreamBoothLora",
    "Folder",
    "IpAdapter",
    "Method",
    "Models",
    "Moma",
    "Pipeline",
    "RealImages",
    "Reference",
    "StockIpAdapter",
    "TextOnly",
    "TextualInversion",
]
