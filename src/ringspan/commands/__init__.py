"""The commands of the command line; `ringspan.cli` is its door and needs nothing of the extra ringspan[cli].

app         the options, and how they go to the commands
asked       what was asked: from words to options and mask, and what the exit status says
source      where q, k and v come from
job         all that a worker must know; refuses what cannot be done
attend      the main job: read, run, put together; workers: in which processes it runs
finish      check, write, tell; check: against float64 attention on sampled rows; memory: the peak
report      progress, the table at the end, complaints
schedule    who does what, when; picture draws it in the terminal, drawing as SVG
doctor      what this machine can use, and why not the rest
"""
