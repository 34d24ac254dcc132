"""From a run, a vocabulary and a world size to what it will take: counts, memory, time and cost."""
