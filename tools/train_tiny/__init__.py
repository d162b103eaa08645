"""The recipe of `wan_fast/assets/tiny`, stage by stage: vae, text, dit, export, evaluate."""
