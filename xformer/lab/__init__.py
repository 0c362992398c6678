"""The lab: the paper's ablations on one cache, the claims that they support or not, and the report."""
