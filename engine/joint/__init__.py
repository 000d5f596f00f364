"""Joint runs: several tasks trained around one backbone, in one run directory whose pipeline does all of them."""
