"""The benchmarks: tasks, variants, runner, costs and report."""
