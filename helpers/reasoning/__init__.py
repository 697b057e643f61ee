"""Reasoning by reinforcement learning (R1 v1 section 2), on a task for a laptop.

countdown    the task in English and Spanish: words, problems, tokenizer
writers      who wrote the corpus: people who verify, and people who guess
mixture      Python and Countdown in one vocabulary
rewards      what the rules pay for (accuracy, format, language) and what curves show
rollout      sampling answers, and the log-probabilities of their tokens
grpo         Group Relative Policy Optimization
sft          supervised fine-tuning on questions and answers
base         the base model that both start from

Imports from `helpers.training`, `helpers.v3`, `helpers.evidence.facts` and
`helpers.checks` only. Nothing is exported here: name the module.
"""
