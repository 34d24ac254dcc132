"""Measurements that need the models but are not training runs; importing this loads nothing."""

PROBES = {
    "step_time": "pipeline.probes.step_time:run",
    "bench": "pipeline.probes.bench:run",
    "machine": "pipeline.probes.machine:run",
    "model_state": "pipeline.probes.model_state:run",
    "gradient_distance": "pipeline.probes.gradient_distance:run",
    "context_use": "pipeline.probes.context_use:run",
    "recall_loss": "pipeline.probes.recall_loss:run",
    "attention_use": "pipeline.probes.attention_use:run",
    "permutation": "pipeline.probes.permutation:run",
    "shuffle": "pipeline.probes.shuffle:run",
    "generation": "pipeline.probes.generation:run",
    "synthetic_task": "pipeline.probes.synthetic_task:run",
    "encoder_decoder": "pipeline.probes.encoder_decoder:run",
}
"""Probe name to function; all take `(runs, context)` on every rank and give the records to keep."""

TASKS = {
    "mqar": "pipeline.probes.task_recall:Mqar",
    "induction": "pipeline.probes.task_recall:Induction",
    "adding": "pipeline.probes.task_memory:Adding",
    "copy_memory": "pipeline.probes.task_memory:CopyMemory",
    "copy_string": "pipeline.probes.task_memory:CopyString",
    "selective_copy": "pipeline.probes.task_memory:SelectiveCopy",
    "parity": "pipeline.probes.task_states:Parity",
    "even_pairs": "pipeline.probes.task_states:EvenPairs",
    "cycle_navigation": "pipeline.probes.task_states:CycleNavigation",
    "modular_arithmetic": "pipeline.probes.task_states:ModularArithmetic",
    "word_problem": "pipeline.probes.task_states:WordProblem",
    "token_at_index": "pipeline.probes.task_order:TokenAtIndex",
    "which_came_first": "pipeline.probes.task_order:WhichCameFirst",
}
"""Name of a synthetic task to its class, whose fields are what a study may state."""
