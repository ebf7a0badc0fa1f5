"""Many models behind one OpenAI-compatible address: `kvcached serve`.

Data travels one way: settings (the file) -> supervisor (engines as child processes, awake or not)
-> upstream (the little that the router sees of a model) -> queues and admission -> application.
"""
