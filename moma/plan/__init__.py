"""Parameters, operations, memory, time and cost of a job, before it runs."""
