"""The load tester behind `octavo bench`: a client only, in processes of its own.

workload    what a request is: lengths, prompt, a file of them; a function of seed and index
schedule    when it is sent, and which process sends it; fixed before anything is sent
sender      sends one request and records what came back, and when
worker      a client process: `python -m octavo.loadtest.worker`
fleet       starts the client processes, runs a point of load on all of them, brings the records together
measure     from records to numbers: pure functions
report      numbers as table and JSON; html_report and charts as a page
"""
