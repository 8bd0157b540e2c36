"""Training losses: pure functions, each with the equation it stands for."""

from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def image_embedding_loss(
    predicted: Float[Tensor, "batch embed_dim"], target: Float[Tensor, "batch embed_dim"]
) -> Float[Tensor, ""]:
    """Eq. 4: the squared distance of the predicted embedding to CLIP(I_ref).

    The mean over the batch *and* over the embedding's dimensions, i.e. Eq. 4 divided by embed_dim: values then compare
    between image encoders, and Adam does not feel the factor. Computed in float32 whatever the inputs' type.
    """
    return F.mse_loss(predicted.float(), target.float())


def image_embedding_cosine(
    predicted: Float[Tensor, "batch embed_dim"], target: Float[Tensor, "batch embed_dim"]
) -> Float[Tensor, ""]:
    """Mean cosine similarity in [-1, 1] of predicted and target embeddings. For logging: Eq. 4 does not contain it."""
    return F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()


def image_embedding_cosine_loss(
    predicted: Float[Tensor, "batch embed_dim"], target: Float[Tensor, "batch embed_dim"]
) -> Float[Tensor, ""]:
    """1 - cosine, in [0, 2]: Eq. 4 without the embedding's length (an ablation; not in the paper)."""
    return 1 - image_embedding_cosine(predicted, target)


def denoising_target(
    scheduler: DDPMScheduler,
    latents: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    timesteps: Int[Tensor, " batch"],
) -> Float[Tensor, "batch channels height width"]:
    """What the base predicts, and Eq. 1 compares: the noise, or where it was trained so the velocity (Salimans and Ho, 2022)."""
    return scheduler.get_velocity(latents, noise, timesteps) if scheduler.config.prediction_type == "v_prediction" else noise


def noise_prediction_losses(
    noise_pred: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "batch 1 height width"] | None = None,
) -> Float[Tensor, " batch"]:
    """Eq. 1 of each sample: the mean squared error of the predicted noise (or velocity), in float32.

    weight: of each position, normalised to a mean of 1 in each sample; None is Eq. 1 as printed.
    """
    errors = F.mse_loss(noise_pred.float(), target.float(), reduction="none")
    if weight is not None:
        errors = errors * weight / weight.mean((1, 2, 3), keepdim=True)
    return errors.mean((1, 2, 3))


def min_snr_weight(alphas_cumprod: Float[Tensor, " batch"], gamma: float, velocity: bool = False) -> Float[Tensor, " batch"]:
    """min(SNR, gamma) / SNR, the weight of a noise-prediction loss; / (SNR + 1) of a velocity's (Hang et al., ICCV 2023, section 3.4)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
