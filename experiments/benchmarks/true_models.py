"""An experiment's models at their own size on one device, with random weights; words are the mini world's, whose ids every vocabulary has."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from experiments.benchmarks.discs import disc
from experiments.mini.recipe import captions, llava
from moma_lightning.batch import TripletBatch
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder
from moma_lightning.modules.base import TrainedPartModule
from moma_lightning.modules.stage2 import Stage2
from moma_lightning.plan.stages import Experiment, build

SD15 = Path("experiments/sd15_llava7b")
LABEL, PLACES = "cat", ["on the beach", "in the snow", "in the jungle", "in the city at night"]


def random_stage(experiment: Experiment, device: torch.device) -> TrainedPartModule:
    """The stage that the planner would count, with values."""
    with device:
        module = build(experiment)
        fill(module)
    if isinstance(module, Stage2):
        module.base.tokenizer = words(module.text_encoder.config.max_position_embeddings)
    if module.decoder is not None:
        teach_words(module.decoder)
    return module


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Small random matrices, zeros for biases, ones for the weights of norms (and for lambda, so that K' and V' have gradients)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(not name.endswith("bias"))


def words(length: int) -> CLIPTokenizer:
    tokenizer = captions.build_tokenizer()
    tokenizer.model_max_length = length
    return tokenizer


def teach_words(decoder: ImageFeatureDecoder) -> None:
    """Real instructions in the place of the planner's, which have a length and no words."""
    vars(decoder).pop("tokenize", None)
    decoder.tokenizer = llava.build_tokenizer()
    decoder.mllm.config.image_token_id = decoder.tokenizer.convert_tokens_to_ids(decoder.image_token)


def random_batch(experiment: Experiment, device: torch.device) -> TripletBatch:
    """Noise, with subjects that cover a quarter of it."""
    count, size = experiment.batch_size, experiment.image_size
    mask: Tensor = disc(0.25, size).expand(count, -1, -1, -1).to(device)
    prompts = [f"a {LABEL} {PLACES[i % len(PLACES)]}" for i in range(count)]
    return TripletBatch(torch.rand(count, 3, size, size, device=device) * 2 - 1, mask, prompts, [LABEL] * count, [str(i) for i in range(count)])
