"""From rows to prompts and from prompts to answers: the steps that tasks share before answers are judged."""
