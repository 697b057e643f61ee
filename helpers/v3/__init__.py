"""DeepSeek-V3 itself, to be read beside the technical report (arXiv:2412.19437).

config       the hyper-parameters, under the names of the published config.json;
             `published` and `native` read the files of Hugging Face and of DeepSeek
rope         positions: RoPE and YaRN
norm         RMSNorm, with a fast gradient
attention    multi-head latent attention and its cache
experts      router, experts, the plain loop over experts; `grouped` is their fast path
model        blocks, multi-token prediction, the whole model
generate     sampling, decoding, drafting with MTP; `fast_decode` is its fast path
fp8          the FP8 recipe: `convert(model, recipe)` swaps modules
checkpoint   files in the published layout; `state_dict` has the published names,
             `tensor_files` and `latest` read and replace files safely

Imports from `helpers.checks` and `helpers.evidence.facts` only.
"""

from helpers.v3.attention import MLA, LatentCache
from helpers.v3.config import V3Config
from helpers.v3.experts import MLP, Experts, MoE, Router, Routing, loop_over_experts
from helpers.v3.generate import (
    Speculation,
    Step,
    decode,
    generate,
    generate_with_mtp,
    sample,
)
from helpers.v3.model import MTP, Block, DeepSeekV3
from helpers.v3.rope import rope_frequencies, rotate

__all__ = [
    "MLA",
    "MLP",
    "MTP",
    "Block",
    "DeepSeekV3",
    "Experts",
    "LatentCache",
    "MoE",
    "Router",
    "Routing",
    "Speculation",
    "Step",
    "V3Config",
    "decode",
    "generate",
    "generate_with_mtp",
    "loop_over_experts",
    "rope_frequencies",
    "rotate",
    "sample",
]
