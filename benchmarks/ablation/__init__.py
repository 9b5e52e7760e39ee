"""The ablation that the PCGrad paper lacks: what is left of its gain where gradients are only clipped or scaled."""
