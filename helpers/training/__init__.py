"""Everything that turns text into a trained model.

runs         where runs and caches lie, how they are named, which code made them
source       a hash of the code that a module rests on
corpus       text, tokenizer, batches
loop         one step after another: stop, resume, save
progress     a bar that leaves one plain line behind
run_folder   one program at a time in it, checkpoints whole
pretrain     losses and settings of pre-training
world        who and how many we are; alone, nothing changes
parallel     how a process finds the others
distributed  what several processes do together

Imports here: `helpers.v3`, `helpers.checks`, `helpers.evidence.facts`. Nothing is
re-exported, so that `runs` can be read without waiting for torch.
"""
