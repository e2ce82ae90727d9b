"""The nano world, which is clips of moving coloured shapes: draw clips, grade them, train the checkpoint in nano/."""
