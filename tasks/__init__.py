"""What knows a modality: one folder per task, and what several tasks share in common/."""
