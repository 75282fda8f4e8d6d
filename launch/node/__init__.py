"""What runs on the nodes of a job: the node's agent, the rendezvous through files, and each rank."""
