"""`model`, `data` and `method`: what a user has, turned into the configuration of a run."""
