"""Whether a run, and the machine it is to run on, are in order: findings in plain sentences, with what to do."""
