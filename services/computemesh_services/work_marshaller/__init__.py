"""work-marshaller (8118): what runs where, until it is done.

Owns       the bucket ``compute-work`` and the object store ``compute-objects``; reads the stream ``COMPUTE_WORK``
Answers    ``compute.work.{request,get,list,cancel,explain,result,logs}.v1`` and their HTTP routes,
           ``compute.objects.{put,get}.v1``
Publishes  ``compute.work.assigned.v1[.<node_id>]``, ``compute.work.stop.v1.<node_id>``,
           ``compute.work.rejected.v1``; the server publishes ``compute.work.state.v1.<work_id>``
Promises   what was stored on ``compute.work.submit.v1`` ends with exactly one recorded outcome, or is
           rejected with a reason; attempts may run more than once, only the current one counts
"""
