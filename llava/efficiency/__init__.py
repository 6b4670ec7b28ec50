"""What an image costs: operations, bytes and the time a device cannot go below, from sizes alone.

`python -m llava.efficiency` prints it. `shapes`, `devices`, `ops`, `flops`, `memory`, `roofline`, `request` and `paper`
are pure functions of sizes and token counts and need the standard library only; `methods` asks a compression method how
many tokens it keeps, or a trace how many it kept.
"""
