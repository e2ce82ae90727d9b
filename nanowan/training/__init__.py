"""What both trainers share: flags, run folder, state, steps, captions, previews."""
