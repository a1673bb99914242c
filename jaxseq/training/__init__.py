"""Training that no recipe has to repeat: data windows, text, the loop, checkpoints and run folders."""
