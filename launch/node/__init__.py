"""Programs that run on the nodes of a job: the node's agent, the rendezvous through files, and the wrapper of each rank."""
