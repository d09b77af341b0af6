"""The commands of the command line, one a module; `ringspan.cli` only declares their options.

asked       what was asked, from the words of the command line to options, mask and problem
source      where q, k and v come from
attend      the main job: read, run, check, write, tell; workers: in which processes it runs
check       the result against float64 attention, on sampled rows
report      progress and the table at the end
schedule    who does what, when; picture draws it in the terminal, drawing as SVG
doctor      what this machine can use
"""
