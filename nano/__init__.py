"""The nano world, clips of moving coloured shapes: drawing them, grading them, and training the checkpoint in nano/."""
