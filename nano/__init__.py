"""The nano world: its clips and captions, its grader, and the training of the checkpoint in nano/."""
