"""torch.library ops: schema, shape rules, autograd. One file per computation."""
