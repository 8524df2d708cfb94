"""From a pipeline and prompts to a policy: measure, search, improve, validate."""
