"""The evaluation tasks, a module each."""
