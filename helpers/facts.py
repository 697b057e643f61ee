"""Published figures of DeepSeek-V3/R1 and the models it is compared with, each with its source and how well it was checked.

As of 2026-11-22. `fact("v3.total_params")` prints as `671B parameters (V3 §4.2; VERIFIED)`; `SOURCES` spells the keys out.
"""

import difflib
from dataclasses import dataclass
from typing import Any

STATUSES = {"VERIFIED": "read in the source named", "VERIFIED-2": "read only in second-hand copies", "DERIVED": "computed from other figures",
            "MEMORY": "not checked", "UNVERIFIABLE": "no source settles it"}

SOURCES = {
    "V3": "DeepSeek-V3 Technical Report, arXiv:2412.19437",
    "V3repo": "github.com/deepseek-ai/DeepSeek-V3: README, README_WEIGHTS, inference/model.py, inference/configs/config_671B.json",
    "HFcfg": "config.json of deepseek-ai/DeepSeek-V3 on Hugging Face",
    "TF": "transformers 5.23.0, defaults of DeepseekV3Config, MixtralConfig and LlamaConfig",
    "R1v1": "DeepSeek-R1, arXiv:2501.12948v1 (January 2025)",
    "R1v2": "DeepSeek-R1, arXiv:2501.12948v2 (January 2026, matches the Nature 2025 paper); some tables read second-hand",
    "R1repo": "github.com/deepseek-ai/DeepSeek-R1, README",
    "ISCA": "Zhao et al., Insights into DeepSeek-V3, ISCA '25, arXiv:2505.09343",
    "L3": "The Llama 3 Herd of Models, arXiv:2407.21783",
    "L3card": "github.com/meta-llama/llama-models, models/llama3_1/MODEL_CARD.md",
    "MIX": "Mixtral of Experts, arXiv:2401.04088, and Mistral's announcements",
    "DualPipe": "github.com/deepseek-ai/DualPipe, README",
    "DeepEP": "github.com/deepseek-ai/DeepEP, README",
    "profile": "github.com/deepseek-ai/profile-data, train.json: 4 MoE layers, 64 H800, 4,096 tokens a GPU, balanced routing",
    "infra": "github.com/deepseek-ai/open-infra-index, day 6",
    "FF": "Fire-Flyer AI-HPC, arXiv:2408.14158",
    "HW": "glennklockwood.com, Hugging Face and trade-press pages that cite NVIDIA's datasheets (not read themselves)",
    "GOV": "NVIDIA's filings with the SEC and US export rules, in part through law and trade press",
    "RENT": "price lists of RunPod, Lambda and Vast, 2026",
    "PRESS": "press and analyst reports (SemiAnalysis, CNBC, BBC-derived pieces), read second-hand",
    "ART": "the article whose claims a to p are examined",
}


def source_keys(source: str) -> list[str]:
    """The keys in a source string: `"V3 §4.2; ISCA §4.1"` gives `["V3", "ISCA"]`."""
    return [part.split()[0] for part in source.split(";")]


def readable(value: Any, between: str = "–") -> str:
    """A figure as people write it: 671B, 14.8T, 70,272, 2.2e-4; a tuple is a range, a dict a row of a table, a text (a date) stays."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{name} {readable(v, '→')}" for name, v in value.items())
    if isinstance(value, tuple):
        return between.join(readable(v) for v in value)
    if abs(value) >= 1e15 or 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.6g}{suffix}"
    return f"{value:,.6g}"


@dataclass(frozen=True, repr=False)
class Fact:
    """One figure. A tuple is a (low, high) range; inside a dict it is (baseline, changed)."""

    value: Any
    unit: str
    source: str
    status: str
    note: str = ""

    def __post_init__(self):
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}: use one of {', '.join(STATUSES)}")

    def __str__(self) -> str:
        status = "not checked" if self.status == "MEMORY" else self.status
        return f"{readable(self.value)} {self.unit}".strip() + f" ({self.source}; {status})"

    def __repr__(self) -> str:
        return f"{self} - {self.note}" if self.note else str(self)


def _rows(prefix: str, source: str, status: str, **rows: tuple) -> dict[str, Fact]:
    """Facts of one source: with the prefix "v3.train.", lr=(value, unit, and a note or none) is the fact "v3.train.lr"."""
    return {prefix + name: Fact(value, unit, source, status, *note) for name, (value, unit, *note) in rows.items()}


FACTS: dict[str, Fact] = {
    # DeepSeek-V3: size
    **_rows("v3.", "V3 §4.2", "VERIFIED", total_params=(671e9, "parameters"), active_params=(37e9, "parameters per token"),
            tokens=(14.8e12, "tokens"), node_limit=(4, "nodes per token (M)")),
    "v3.hf_params": Fact(685e9, "parameters", "V3repo README", "VERIFIED", "671B plus 14B for the MTP module"),
    "v3.mtp_params": Fact(14e9, "parameters", "V3repo README", "VERIFIED", "counts a second copy of embedding and head"),
    **_rows("v3.", "V3repo README_WEIGHTS", "VERIFIED",
            active_params_weights_readme=(36.7e9, "parameters per token", "said to include embedding and head; only the head-only count comes near"),
            mtp_unique=(11.5e9, "parameters", "without eh_proj"),
            mtp_active=(2.4e9, "parameters per token", "with embedding and head, without eh_proj")),
    **_rows("v3.", "HFcfg", "DERIVED", recomputed_total=(671.03e9, "parameters", "without MTP"),
            recomputed_active_with_emb_head=(37.55e9, "parameters per token"), recomputed_active_head_only=(36.63e9, "parameters per token"),
            recomputed_active_neither=(35.70e9, "parameters per token"),
            mtp_unique_recomputed=(11.61e9, "parameters", "with the 7168 x 14336 eh_proj"),
            mtp_active_recomputed=(2.54e9, "parameters per token", "with eh_proj, embedding and head"),
            hf_recomputed=(684.49e9, "parameters", "671.03B + 11.61B + embedding and head again"),
            active_fraction=(0.056, "of all parameters", "37.55B / 671.03B"), routed_expert_share=(0.974, "of all parameters"),
            train_gflops_recomputed=(250.5, "GFLOP per token", "6 x 36.63B + causal attention 30.7")),
    # DeepSeek-V3: training
    "v3.context": Fact(131072, "tokens", "V3 §4.3", "VERIFIED", "printed as 128K"),
    "v3.context_hf": Fact(163840, "positions", "HFcfg", "VERIFIED", "max_position_embeddings = 40 x 4096"),
    "v3.long_context_tokens": Fact(126e9, "tokens", "V3 §4.3", "DERIVED", "1000 x (1920 x 32768 + 480 x 131072)"),
    **_rows("v3.", "V3 §4.3", "VERIFIED", context_batches=({"1920 of": 32768, "480 of": 131072}, "tokens per step of each phase"),
            context_steps=(1000, "steps per phase", "learning rate 7.3e-6, where pre-training had ended")),
    "v3.needle": Fact("found at all lengths up to 128K", "", "V3 §4.3", "MEMORY", "a figure without numbers"),
    **_rows("v3.train.", "V3 §4.2", "VERIFIED", seq_len=(4096, "tokens", "printed as 4K"), lr=(2.2e-4, ""), beta1=(0.9, ""), beta2=(0.95, ""),
            weight_decay=(0.1, ""), grad_clip=(1.0, "gradient norm"), warmup_steps=(2000, "steps"), constant_until_tokens=(10e12, "tokens"),
            cosine_tokens=(4.3e12, "tokens"), final_lr_1=(2.2e-5, "", "end of the cosine, then held"), final_tokens_1=(333e9, "tokens"),
            final_lr_2=(7.3e-6, ""), final_tokens_2=(167e9, "tokens"), batch_start=(3072, "sequences"), batch_end=(15360, "sequences"),
            batch_ramp_tokens=(469e9, "tokens"), gamma=(0.001, "bias step"), gamma_tokens=(14.3e12, "tokens", "0.0 for the last 500B"),
            alpha=(1e-4, "sequence-wise balance loss weight", "HFcfg has 0.001; the paper rules"), lambda_first=(0.3, "MTP loss weight"),
            lambda_last=(0.1, "MTP loss weight"), lambda_switch_tokens=(10e12, "tokens"), init_std=(0.006, "", "HFcfg has 0.02")),
    "v3.train.batch_end_tokens": Fact(62.9e6, "tokens per step", "V3 §4.2", "DERIVED"),
    # Prediction, cache, links
    "v3.mtp_acceptance": Fact((0.85, 0.90), "of second tokens", "V3 §5.4.3", "VERIFIED"),
    "v3.mtp_acceptance_isca": Fact((0.80, 0.90), "of second tokens", "ISCA §2.3.3", "VERIFIED"),
    "v3.mtp_speedup": Fact(1.8, "x tokens per second", "V3 §5.4.3; ISCA §2.3.3", "VERIFIED"),
    "v3.mtp_tokens_per_step": Fact((1.85, 1.90), "tokens per step", "V3 §5.4.3", "DERIVED", "1 + acceptance"),
    "v3.kv_bytes": Fact(70272, "bytes per token", "ISCA Table 1", "VERIFIED", "BF16; (512 + 64) x 2 x 61"),
    "v3.gpus": Fact(2048, "H800", "V3 §3.1", "VERIFIED"),
    "h800.nvlink": Fact(400, "GB/s", "ISCA §4.1", "VERIFIED", "both directions together"),
    "h100.nvlink": Fact(900, "GB/s", "ISCA §4.1", "VERIFIED", "both directions together"),
    "h800.nvlink_way": Fact((160, 200), "GB/s each way", "ISCA §4.3", "VERIFIED", "achievable and nominal"),
    "h800.infiniband": Fact(50, "GB/s each way and GPU", "V3 §3.2.2; ISCA §4.1", "VERIFIED", "400 Gb/s; the H100's is the same"),
    "a100.nvlink": Fact(600, "GB/s", "HW", "VERIFIED-2", "both directions together"),
    "hbm": Fact({"A100": 2.039, "H800": 3.35, "H100": 3.35}, "TB/s", "HW", "VERIFIED-2", "the H800's from trade press only"),
    "deepep.dispatch": Fact({"EP8": 153, "EP16": 43, "EP32": 58, "EP64": 51, "V2 EP16": 90, "V2 EP32": 61}, "GB/s", "DeepEP", "VERIFIED", "logical"),
    "deepep.combine": Fact({"EP8": 158, "EP16": 43, "EP32": 57, "EP64": 50, "V2 EP16": 81, "V2 EP32": 61}, "GB/s", "DeepEP", "VERIFIED", "logical"),
    # Peaks of the hardware; datasheets often print twice as much, which is for sparse matrices
    "a100.bf16": Fact(312, "TFLOPS, dense", "HW", "VERIFIED-2", "an A100 has no FP8"),
    **_rows("h100.", "HW", "VERIFIED-2", bf16=(989.4, "TFLOPS, dense"), fp8=(1978.9, "TFLOPS, dense")),
    "h800.bf16": Fact(988, "TFLOPS, dense", "ISCA Table 4", "DERIVED", "432 TFLOPS / 43.73%"),
    "h800.fp8": Fact(1976, "TFLOPS, dense", "ISCA Table 4; V3 §3.3", "DERIVED", "twice the BF16 peak, 'theoretically'"),
    **_rows("h20.", "HW", "VERIFIED-2", bf16=(148, "TFLOPS, dense"), fp8=(296, "TFLOPS, dense")),
    # One step of V3's pre-training, and its scope
    "v3.train_gflops": Fact(250, "GFLOP per token", "ISCA Table 2", "VERIFIED", "forward and backward, length 4096"),
    **_rows("v3.", "ISCA Table 4", "VERIFIED", step_seconds=(19.926, "seconds per step"), tokens_per_day=(272.80e9, "tokens per day"),
            step_parts=({"1F": 1.13, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "bubble": 2.06, "optimizer": 0.29}, "s"),
            tflops_per_gpu=(385, "TFLOPS per GPU", "causal count"),
            tflops_noncausal=(432, "TFLOPS per GPU", "counts the whole attention square"),
            mfu=(0.3894, "of the BF16 peak", "causal count; most GEMMs run in FP8"),
            mfu_noncausal=(0.4373, "of the BF16 peak", "whole attention square; most GEMMs run in FP8")),
    "v3.tflops_per_gpu_recomputed": Fact(386, "TFLOPS per GPU", "ISCA Table 2; V3 Table 1", "DERIVED"),
    "v3.parallel": Fact({"pipeline": 16, "experts": 64, "SMs that send": 20}, "GPUs (of 132 SMs)", "V3 §3.2", "VERIFIED", "no tensor parallelism"),
    **_rows("profile.", "profile", "DERIVED",
            compute=({"attention F": 4.60, "MLP F": 4.64, "MLP I": 5.36, "MLP W": 5.07, "attention I": 9.54, "attention W": 2.40}, "ms per layer",
                     "means over the layers of the trace"),
            kernels=({"dispatch F": 4.35, "combine F": 6.18, "dispatch B": 3.41, "combine B": 6.18}, "ms per layer"),
            pair=({"span": 129.0, "compute": 124.3, "communication": 114.5, "both": 110.3}, "ms per pair of chunks")),
    "v3.gpu_hours_per_trillion": Fact(180e3, "H800 hours per 1T tokens", "V3 §1", "VERIFIED"),
    "v3.days_per_trillion": Fact(3.7, "days per 1T tokens", "V3 §1", "VERIFIED", "on 2048 GPUs"),
    "v3.scope": Fact("the official training only; earlier research and trial runs on architectures, algorithms and data are left out",
                     "", "V3 §1", "VERIFIED", "in our words"),
    "v3.trial_active_small": Fact(2.4e9, "parameters per token", "V3 Table 4", "VERIFIED", "of 15.7B"),
    "v3.trial_active_large": Fact(20.9e9, "parameters per token", "V3 Table 4", "VERIFIED", "of 228.7B"),
    "v3.trial_tokens": Fact({"MTP, small": 1.33e12, "MTP, large": 540e9, "balance, small": 1.33e12, "balance, large": 578e9,
                             "FP8, small": 1.33e12, "FP8, large": 0.9e12}, "tokens per arm",
                            "V3 Table 4; V3 Table 5; V3 App. B", "VERIFIED", "two arms each; a baseline may have served twice"),
    # Cost
    **_rows("v3.", "V3 Table 1", "VERIFIED", gpu_hours_pretrain=(2.664e6, "H800 hours"), gpu_hours_context=(119e3, "H800 hours"),
            gpu_hours_post=(5e3, "H800 hours"), gpu_hours=(2.788e6, "H800 hours", "official run only, no earlier research"),
            usd_per_gpu_hour=(2, "USD per H800 hour", "an assumed rental price"), usd=(5.576e6, "USD")),
    **_rows("r1.", "R1v2 Table 7", "VERIFIED-2", gpu_hours=(147e3, "H800 hours"), usd=(294e3, "USD"), gpu_hours_zero=(101e3, "H800 hours"),
            gpu_hours_sft_data=(5e3, "H800 hours"), gpu_hours_r1=(41e3, "H800 hours")),
    "r1.usd_with_base": Fact(5.87e6, "USD", "V3 Table 1; R1v2 Table 7", "DERIVED"),
    **_rows("r1.", "R1v2 B.4.4", "VERIFIED", gpus=(512, "H800"), wall_hours_zero=(198, "hours"),
            wall_hours_r1=(80, "hours", "the same sentence says about 4 days"),
            wall_days_r1=(4, "days", "the same sentence says roughly 80 hours")),
    "r1.gpus_press": Fact(648, "H800", "PRESS", "VERIFIED-2", "a misreading of 64*8"),
    # R1-Zero, and R1's stages and samples
    **_rows("r1.", "R1v2 Table 3", "VERIFIED-2", aime_zero=(77.9, "AIME 2024 pass@1, R1-Zero", "71.0 in the first version"),
            aime_cold_start=(59.0, "AIME 2024 pass@1, Dev1"),
            stages_aime=({"Zero": 77.9, "Dev1": 59.0, "Dev2": 74.0, "Dev3": 78.1, "R1": 79.8}, "AIME 2024 pass@1"),
            stages_math500=({"Zero": 95.9, "Dev1": 94.2, "Dev2": 95.9, "Dev3": 95.4, "R1": 97.3}, "MATH-500"),
            stages_ifeval=({"Zero": 46.6, "Dev1": 71.7, "R1": 83.3}, "IF-Eval", "Dev2, Dev3 not seen")),
    "r1.aime_zero_v1": Fact(71.0, "AIME 2024 pass@1, R1-Zero", "R1v1", "VERIFIED", "77.9 in the second version"),
    "r1.aime_zero_start": Fact(15.6, "AIME 2024 pass@1, start of RL", "R1v1; R1v2", "VERIFIED"),
    "r1.aime_zero_vote": Fact(86.7, "AIME 2024, majority vote", "R1v1; R1v2", "VERIFIED", "of 64 answers in the first version, 16 in the second"),
    **_rows("r1.zero_", "R1v2", "VERIFIED", steps=(10400, "RL steps"), questions=(32, "questions per step"), group=(16, "answers per question"),
            lr=(3e-6, "learning rate"), kl=(0.001, "KL weight"), refresh=(400, "steps between new references")),
    "r1.zero_length": Fact("hundreds to thousands of", "reasoning tokens", "R1v1 §2.2.4; R1v2 §2.3", "VERIFIED"),
    "r1.zero_reflection": Fact((5, 7), "times as many reflective words", "R1v2 C.2", "VERIFIED"),
    "r1.zero_problems": Fact("endless repetition, poor readability, and language mixing", "", "R1repo", "VERIFIED"),
    "r1.temperature": Fact((0.5, 0.7), "temperature advised, against endless repetition", "R1repo", "MEMORY"),
    "r1.sft_samples": Fact(800e3, "samples", "R1v1 §2.3", "VERIFIED"),
    "r1.sft_samples_v2": Fact(804745, "samples", "R1v2 Table 5", "VERIFIED-2", "printed as about 800K elsewhere"),
    "r1.sft_mean_tokens": Fact(5355, "tokens per sample on average", "R1v2 Table 5", "VERIFIED-2"),
    # R1's scores, the six distilled models, and RL against distillation at 32B and on V2.5
    "r1.scores": Fact({"AIME 2024 pass@1": 79.8, "MATH-500": 97.3, "GPQA Diamond": 71.5, "LiveCodeBench": 65.9, "Codeforces": 2029}, "R1",
                      "R1v1 Table 4", "VERIFIED", "Codeforces as a rating"),
    "r1.distill_bases": Fact({"Qwen-1.5B": "Qwen2.5-Math-1.5B", "Qwen-7B": "Qwen2.5-Math-7B", "Qwen-14B": "Qwen2.5-14B", "Qwen-32B": "Qwen2.5-32B",
                              "Llama-8B": "Llama-3.1-8B", "Llama-70B": "Llama-3.3-70B-Instruct"}, "", "R1v1 §2.4; R1repo", "VERIFIED"),
    **{f"r1.distill_{key}": Fact(dict(zip(("Qwen-1.5B", "Qwen-7B", "Qwen-14B", "Qwen-32B", "Llama-8B", "Llama-70B"), values, strict=True)), unit,
                                 "R1v1 Table 5; R1repo", "VERIFIED")
       for key, unit, values in (("aime", "AIME 2024 pass@1", (28.9, 55.5, 69.7, 72.6, 50.4, 70.0)),
                                 ("cons64", "AIME 2024 cons@64", (52.7, 83.3, 80.0, 83.3, 80.0, 86.7)),
                                 ("math500", "MATH-500", (83.9, 92.8, 93.9, 94.3, 89.1, 94.5)),
                                 ("gpqa", "GPQA Diamond", (33.8, 49.1, 59.1, 62.1, 49.0, 65.2)),
                                 ("lcb", "LiveCodeBench", (16.9, 37.6, 53.1, 57.2, 39.6, 57.5)),
                                 ("codeforces", "Codeforces rating", (954, 1189, 1481, 1691, 1205, 1633)))},
    "r1.distill_epochs": Fact((2, 3), "epochs", "R1v2", "VERIFIED-2"),
    "r1.distill_further": Fact("significant further gains", "from RL on the distilled models", "R1v1 §3.2", "VERIFIED-2",
                                "left to others, no numbers"),
    "r1.qwen32b_rl": Fact({"AIME 2024 pass@1": 47.0, "AIME 2024 cons@64": 60.0, "MATH-500": 91.6, "GPQA Diamond": 55.0, "LiveCodeBench": 40.2},
                          "R1-Zero-Qwen-32B", "R1v1 Table 6", "VERIFIED", "R1v2 Table 16 calls it Qwen2.5-32B-Zero"),
    "r1.qwen32b_rl_steps": Fact(10e3, "RL steps or more", "R1v1 §4.1", "VERIFIED", "printed as over 10K"),
    "v25.distil": Fact({"LiveCodeBench-CoT": (31.1, 37.4), "its length": (718, 783), "MATH-500": (74.6, 83.2), "its length ": (769, 1510)},
                       "pass@1 and tokens, without and with R1's answers", "V3 Table 9", "VERIFIED", "on V2.5"),
    # Fleets, GPT-4, and what the article says
    "fleet.a100": Fact(10000, "A100 PCIe", "FF", "VERIFIED"),
    "fleet.a100_rumoured": Fact(50000, "A100", "ART; PRESS", "UNVERIFIABLE", "reports say Hopper mix or H100"),
    "fleet.a100_usd_per_hour": Fact(1.35, "USD per A100 hour", "ART", "MEMORY", "no page dated January 2025 was found"),
    "fleet.usd_per_week": Fact(11.34e6, "USD per week", "ART", "DERIVED", "arithmetic on unconfirmed inputs"),
    "fleet.a100_rent": Fact({"RunPod PCIe": 1.19, "RunPod SXM": 1.39, "Lambda": 1.48, "Vast, low": 0.53, "Vast, high": 1.50},
                            "USD per A100 hour", "RENT", "VERIFIED", "prices of 2026"),
    **_rows("fleet.", "PRESS", "VERIFIED-2", hopper=(50e3, "Hopper GPUs", "SemiAnalysis, 31 January 2025, 'not the same as 50,000 H100'"),
            hopper_h800=(10e3, "H800", "SemiAnalysis"), hopper_h100=(10e3, "H100", "SemiAnalysis"),
            capex=(1.6e9, "USD of servers", "SemiAnalysis; its own table also says 1.3B"), opex=(944e6, "USD to operate", "SemiAnalysis")),
    "fleet.hopper_h20": Fact(30e3, "H20", "PRESS", "DERIVED", "the rest of the 50,000"),
    "fleet.h100_wang": Fact(50e3, "H100", "PRESS", "VERIFIED", "A. Wang on CNBC, January 2025; he gave no evidence"),
    **_rows("gpt4.", "PRESS", "VERIFIED-2", a100=(25000, "A100", "a leak, never confirmed by OpenAI"), days=((90, 100), "days", "the same leak"),
            mfu=((0.32, 0.36), "of the A100's BF16 peak", "the same leak"), usd=(63e6, "USD", "the same leak, at 1 USD per hour")),
    **_rows("article.", "ART", "VERIFIED", gpu_hours_v3=(2.788e6, "GPU hours"), gpu_hours_llama=(39.3e6, "GPU hours", "three models together"),
            usd=(5.58e6, "USD", "5.576M rounded")),
    "article.gpu_hours_ratio": Fact(14.1, "x V3's GPU hours", "ART", "DERIVED", "implied by its two figures"),
    # Dates: year, month and day as far as they are known
    "date.licence": Fact("2022-08-26", "", "GOV", "VERIFIED-2", "US licence needed to sell A100 and H100 to China"),
    "date.rule_2022": Fact("2022-10-07", "", "GOV", "VERIFIED", "export rule 1: chips with links of 600 GB/s or more"),
    "date.a800": Fact("2022-11", "", "PRESS", "VERIFIED-2", "A800 launched, an A100 with slower links"),
    "date.h800": Fact("2023-03-21", "", "PRESS", "VERIFIED-2", "H800 launched, an H100 with slower links"),
    "date.rule_2023": Fact("2023-10-17", "", "GOV", "VERIFIED", "export rule 2, on performance: A800 and H800 too"),
    "date.rule_effective": Fact("2023-10-23", "", "GOV", "VERIFIED-2", "rule 2 in force for A100, A800, H100, H800"),
    "date.h20": Fact("2024", "", "PRESS", "VERIFIED-2", "H20 shipped"),
    "date.llama31": Fact("2024-07", "", "L3", "DERIVED", "Llama 3.1 paper; month from the arXiv number"),
    "date.v3": Fact("2024-12", "", "V3", "DERIVED", "V3 report; month from the arXiv number"),
    "date.r1": Fact("2025-01", "", "R1v1", "VERIFIED", "R1 and R1-Zero, first version of the paper"),
    "date.article": Fact("2025-01-31", "", "ART", "VERIFIED", "the article"),
    "date.isca": Fact("2025-05", "", "ISCA", "DERIVED", "Insights into DeepSeek-V3; month from the arXiv number"),
    "date.r1v2": Fact("2026-01", "", "R1v2", "VERIFIED", "R1's hours and dollars disclosed"),
    # The models it is compared with
    **_rows("llama405b.", "L3 §1", "VERIFIED", params=(405e9, "parameters"), tokens=(15.6e12, "tokens", "the model card says 15T+"),
            flops=(3.8e25, "FLOP")),
    "llama405b.recomputed_total": Fact(405.85e9, "parameters", "L3 Table 3", "DERIVED"),
    **_rows("llama405b.", "L3 §3.4.2", "VERIFIED", train_length=(8192, "tokens", "printed as 8K"), context=(131072, "tokens", "printed as 128K"),
            long_context_tokens=(800e9, "tokens", "six stages")),
    "llama31.rope_theta": Fact(500e3, "base of RoPE", "L3 Table 3", "VERIFIED"),
    "llama31.rope_scaling": Fact({"factor": 8, "low": 1, "high": 4, "original": 8192}, "turns and tokens", "TF", "VERIFIED",
                                 "named as the original's in the code of rope type llama3; not YaRN"),
    **_rows("llama405b.", "L3 Table 4", "VERIFIED", gpus=(16384, "H100"), mfu=(0.41, "of the BF16 peak"),
            tflops_per_gpu=(400, "TFLOPS per GPU", "16,384 GPUs, length 8192, BF16")),
    **_rows("llama405b.", "L3 §3.3.4", "VERIFIED", effective_time=(0.90, "of the time, at least"),
            interruptions=(466, "interruptions", "in 54 days, 419 of them unexpected"),
            interruption_days=(54, "days", "the window in which interruptions were counted")),
    "llama405b.kv_bytes": Fact(516096, "bytes per token", "ISCA Table 1", "VERIFIED"),
    "llama405b.train_gflops": Fact(2448, "GFLOP per token", "ISCA Table 2", "VERIFIED", "counts half the causal attention"),
    "llama405b.gpu_hours": Fact(30.84e6, "H100 hours", "L3card", "VERIFIED"),
    "llama70b.gpu_hours": Fact(7.0e6, "H100 hours", "L3card", "VERIFIED"),
    "llama8b.gpu_hours": Fact(1.46e6, "H100 hours", "L3card", "VERIFIED"),
    "llama31.gpu_hours": Fact(39.3e6, "H100 hours", "L3card", "VERIFIED", "the 8B, 70B and 405B models together"),
    "llama405b.gpu_hours_ratio": Fact(11.1, "x V3's GPU hours", "V3 Table 1; L3card", "DERIVED", "H100 against H800"),
    "qwen72b.kv_bytes": Fact(327680, "bytes per token", "ISCA Table 1", "VERIFIED"),
    "mixtral8x7b.total_params": Fact(46.7e9, "parameters", "MIX", "VERIFIED-2", "47B in the abstract"),
    "mixtral8x7b.active_params": Fact(12.9e9, "parameters per token", "MIX", "VERIFIED-2", "13B in the abstract"),
    **_rows("mixtral8x7b.", "TF", "DERIVED", recomputed_total=(46.70e9, "parameters"), recomputed_active=(12.88e9, "parameters per token"),
            active_fraction=(0.276, "of all parameters"), kv_bytes=(131072, "bytes per token")),
    **_rows("mixtral8x22b.", "MIX", "VERIFIED-2", total_params=(141e9, "parameters"), active_params=(39e9, "parameters per token")),
    **_rows("mixtral8x22b.", "MIX", "DERIVED", recomputed_total=(140.62e9, "parameters"), recomputed_active=(39.15e9, "parameters per token"),
            active_fraction=(0.278, "of all parameters"), kv_bytes=(229376, "bytes per token")),
    # Ablations: validation loss per balance scheme; (baseline, changed) per benchmark
    "v3.balance_1b": Fact({"sequence-wise": 2.258, "loss-free": 2.253, "batch-wise": 2.253}, "validation loss", "V3 §4.5.3", "VERIFIED"),
    "v3.balance_3b": Fact({"sequence-wise": 2.085, "loss-free": 2.080, "batch-wise": 2.080}, "validation loss", "V3 §4.5.3", "VERIFIED"),
}

_BENCHMARKS = ("Pile BPB", "BBH", "MMLU", "DROP", "TriviaQA", "NaturalQ", "HumanEval", "MBPP", "GSM8K", "MATH")
for _key, _source, _note, _base, _changed in (
    ("v3.mtp_ablation_small", "V3 Table 4", "15.7B model, 2.4B active, 1.33T tokens; without and with MTP",
     (0.729, 39.0, 50.0, 39.2, 56.9, 22.7, 20.7, 35.8, 25.4, 10.7), (0.729, 41.4, 53.3, 41.3, 57.7, 22.3, 26.8, 36.8, 31.4, 12.6)),
    ("v3.mtp_ablation_large", "V3 Table 4", "228.7B model, 20.9B active, 540B tokens; without and with MTP",
     (0.658, 70.0, 67.5, 68.5, 67.0, 27.2, 44.5, 61.6, 72.3, 38.6), (0.657, 70.7, 66.6, 70.6, 67.3, 28.5, 53.7, 62.2, 74.0, 39.8)),
    ("v3.loss_free_ablation_small", "V3 Table 5", "1.33T tokens; auxiliary loss against loss-free balancing",
     (0.727, 37.3, 51.0, 38.1, 58.3, 23.2, 22.0, 36.6, 27.1, 10.9), (0.724, 39.3, 51.8, 39.0, 58.5, 23.4, 22.6, 35.8, 29.6, 11.1)),
    ("v3.loss_free_ablation_large", "V3 Table 5", "578B tokens; auxiliary loss against loss-free balancing",
     (0.656, 66.7, 68.3, 67.1, 66.7, 27.1, 40.2, 59.2, 70.7, 37.2), (0.652, 67.9, 67.2, 67.1, 67.7, 28.1, 46.3, 61.2, 74.5, 39.6)),
):
    FACTS[_key] = Fact(dict(zip(_BENCHMARKS, zip(_base, _changed, strict=True), strict=True)), "", _source, "VERIFIED", _note)


def fact(key: str) -> Fact:
    """The figure under `key`; an unknown key raises ValueError with the nearest known ones."""
    if key not in FACTS:
        near = difflib.get_close_matches(key, FACTS, n=3, cutoff=0.4)
        raise ValueError(f"no fact {key!r}; nearest: {', '.join(near) or 'none'}")
    return FACTS[key]


@dataclass(frozen=True)
class Claim:
    """What the article says, what is asked of it here, and how the answer came out."""

    letter: str
    claim: str
    question: str
    verdict: str
    correction: str
    source: str
    notebook: str


CLAIMS: list[Claim] = [
    Claim("a", "R1 was made from V3-Base by SFT and RL.", "Which stages does R1 need, and what does each add?", "CORRECT",
          "Two SFT and two RL stages; the 800K-sample SFT starts again from V3-Base.", "R1v1 §1; R1repo", "09_r1"),
    Claim("b", "V3 was designed around H100 limits and export controls.", "Which design choices follow from a slower NVLink?",
          "CORRECT in substance, PARTLY in wording", "The chip designed for is the H800, with NVLink at 400 instead of 900 GB/s.",
          "ISCA §4.1; V3 §3.2", "07_h800_cluster"),
    Claim("c", "V3 is an MoE like Mixtral, but more efficient.", "At equal active parameters, what do many small experts change?", "PARTLY",
          "256 + 1 small experts, top-8, loss-free balance, MLA; 5.6% active against 28%. 'Efficient' needs a metric.",
          "V3 §2; MIX", "01_mixture_of_experts"),
    Claim("d", "V3 has 671B parameters, Llama 3.1 has 405B.", "Do both totals come out of the published shapes?", "CORRECT",
          "37B against 405B are active per token; Hugging Face shows 685B because it adds MTP.",
          "V3 §4.2; V3repo README; L3 §1", "01_mixture_of_experts"),
    Claim("e", "Both models use FP8 quantization.", "What does FP8 touch in each model, and when?", "PARTLY (misleading)",
          "V3 trained in FP8. Llama 405B trained in BF16; FP8 came afterwards, for inference, FFN only.", "V3 §3.3; L3 §6.2", "05_fp8"),
    Claim("f", "V3 saw 14.8T tokens, Llama 3.1 15T.", "What loss does the same recipe reach on real text at toy size?", "CORRECT (rounded)",
          "The 405B model saw 15.6T; the tokenizers differ.", "V3 §4.2; L3 §1; L3card", "04_pretraining"),
    Claim("g", "Both read 128K tokens of context.", "What does the cache cost at 128K, and how is 4K stretched?", "CORRECT",
          "V3: YaRN and about 126B extra tokens. Llama: six stages and about 800B tokens.", "V3 §4.3; L3 §3.4.2", "06_long_context"),
    Claim("h", "V3 took 2.788M GPU hours, Llama 39.3M.", "What is the ratio for one model against one model?", "figures CORRECT, comparison WRONG",
          "39.3M adds up three Llama sizes; the 405B alone took 30.84M, 11.1 times V3, on H100.", "V3 Table 1; L3card", "11_training_cost"),
    Claim("i", "V3's hours cover the last run; Llama's are cumulative; R1's may be missing.", "What does each published sum contain?",
          "CORRECT on V3; doubt resolvable", "Cumulative means over model sizes. R1 adds 147K hours, 5.3%, disclosed later.",
          "V3 §1; L3card; R1v2 B.4.4", "11_training_cost"),
    Claim("j", "R1 was distilled into smaller dense Llama and Qwen models.", "Does a small dense student gain more from SFT than from RL?", "CORRECT",
          "Six students, 1.5B to 70B, SFT only, on the 800K samples.", "R1v1 §2.4", "10_distillation"),
    Claim("k", "R1-Zero had no SFT and read badly; cold start and more stages fixed it.", "What goes wrong without SFT, and which stage cures it?",
          "CORRECT with nuance", "A language reward curbs mixing at a small cost and R1 still mixes; cold start first lowers AIME, 77.9 to 59.0.",
          "R1v1 §2.2; R1v2 Table 3", "08_r1_zero"),
    Claim("l", "V3 learned R1's verification and reflection.", "Does training on R1-style answers change a chat model's habits?", "CORRECT",
          "The published ablation was run on V2.5, not on V3.", "V3 §5.4.1", "09_r1"),
    Claim("m", "All training ran on H800s with half the link speed.", "How much slower is the link, and where does it bite?", "PARTLY",
          "400 / 900 is 44%, inside a node only. A100s served preparatory R1 work; distillation hardware is unstated.",
          "V3 §3.1; ISCA §4.1; R1v2 B.4.4", "07_h800_cluster"),
    Claim("n", "5.58M USD is V3's cost; R1's is higher.", "What is added when R1's own stage is counted?", "CORRECT (as cumulative)",
          "R1's own stage is 294K USD; with the base about 5.87M.", "V3 Table 1; R1v2 Table 7", "11_training_cost"),
    Claim("o", "DeepSeek owns 50,000 A100s; GPT-4 took 25,000.", "Which fleet sizes can be traced to a document?",
          "UNVERIFIABLE; A100 label very likely WRONG",
          "About 10,000 A100s are documented; reports put 50,000 on Hopper chips. GPT-4's figure is a leak.", "FF; PRESS", "11_training_cost"),
    Claim("p", "50,000 A100s at 1.35 USD cost 11.34M a week; High-Flyer is a hedge fund.", "Does the arithmetic hold, and do its inputs?",
          "arithmetic CORRECT, premise UNVERIFIABLE; hedge fund CORRECT", "With the 10,000 documented it is 2.27M a week; the price is unconfirmed.",
          "ART; FF; PRESS", "11_training_cost"),
]

# As published, without auto_map (remote code) and transformers_version. Where it differs from the paper see v3.train.alpha, .init_std.
V3_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "moe_layer_freq": 1, "first_k_dense_replace": 3,
    "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "pretraining_tp": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True, "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 163840, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
                     "mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
}


# name -> (model_type, kwargs) for transformers.AutoConfig.for_model: enough to count parameters and KV bytes, not to load weights.
_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PEERS: dict[str, tuple[str, dict[str, Any]]] = {name: (kind, dict(zip(_SHAPE, sizes, strict=True)) | more) for name, kind, sizes, more in (
    ("Llama 3.1 405B", "llama", (128256, 16384, 53248, 126, 128, 8), {}),
    ("Mixtral 8x7B", "mixtral", (32000, 4096, 14336, 32, 32, 8), {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("Mixtral 8x22B", "mixtral", (32000, 6144, 16384, 56, 48, 8), {"num_local_experts": 8, "num_experts_per_tok": 2}),
    # KV bytes only: 80 layers, 8 KV heads and head size 128 follow from ISCA Table 1; vocabulary, hidden, FFN, heads are MEMORY.
    ("Qwen2.5 72B", "qwen2", (152064, 8192, 29568, 80, 64, 8), {}))}
