"""What can be evaluated. Importing this package is what makes the class names known to configs."""

from evaluation.methods.base import Method, Models, Reference
from evaluation.methods.diffusion import IpAdapter, Moma, TextOnly
from evaluation.methods.given import Folder, RealImages

__all__ = ["Folder", "IpAdapter", "Method", "Models", "Moma", "RealImages", "Reference", "TextOnly"]
