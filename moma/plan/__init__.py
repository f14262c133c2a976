"""Plans of a training job: parameters, operations, memory, time and cost."""
