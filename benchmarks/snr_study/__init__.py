"""SNR against MMoE and PLE on the flights of the demo, its L0 weight swept."""
