"""A session on a terminal or a pipe: the answer goes to stdout and everything else to stderr.

`first` is the prompt while the model loads, `repl` reads lines after it and answers them: `lines`
are what is typed, `kept` what stays between runs. `commands` are the lines with a slash; `adjust`
is what `/set` changes, `names` are files as they are typed, `clipboard` is for `/copy`, `showing`
for what `/show` and others tell. `screen` shows the events of a reply, `markdown` marks its text;
`statistics` has the words for what a reply took, `drawing` bars and attributes, `progress` the bars
of a load and of a prompt, `start` the words for memory and disk at the start, `trace` the file of
`--trace`. No tensor code here.
"""
