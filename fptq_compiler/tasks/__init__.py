"""Multiple-choice tasks by likelihood, as lm-evaluation-harness scores them."""
