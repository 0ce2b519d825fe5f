"""Search by photo over HTTP: an API, and a page that uses it.

config      what a request may cost, and who computes
schema      what is asked and answered, as JSON
photos      stored photos of database rows, and small copies of them
version     one published version of an index, opened; `Live` holds the newest
embedding   a photo's bytes to a vector, many at a time
batches     one thread that answers together what waits together
service     a query to an answer; needs no HTTP
metrics     what Prometheus reads
limits      body, time, number of requests, token, headers
app         the routes
local       one process; `deploy` puts replicas on Ray Serve
"""
