"""Golden checks: stbench compared with numbers that the published implementations produced."""
