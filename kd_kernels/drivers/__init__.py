"""How tokens and vocabulary are walked inside an op. Drivers know GEMMs and memory, no formulas."""
