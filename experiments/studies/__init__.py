"""Programs on many prompts: studies, their analysis, the report."""
