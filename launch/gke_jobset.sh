#!/usr/bin/env bash
# Trains on GKE's TPUs as a JobSet: one pod for each host of every slice, all started again when one of them ends early.
#
#   launch/gke_jobset.sh --name=NAME --image=IMAGE --accelerator=tpu-v5p-slice --topology=4x4x4 --hosts=16 \
#     --config=configs/titans_1b.py --workdir=gs://BUCKET/FOLDER [options] [-- flags of mc_jax.train]
#
#   --name=NAME             of the JobSet: small letters, digits and dashes
#   --image=IMAGE           built of launch/Dockerfile
#   --accelerator=LABEL     of the node pool: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu-v4-podslice
#   --topology=TOPOLOGY     of a slice, such as 4x4x4 or 16x16
#   --hosts=N               of a slice: its chips / --chips
#   --config=FILE           the run, by its path in the image
#   --workdir=BUCKET        gs://BUCKET/FOLDER; a run goes on from the checkpoint that is there
#   --chips=N               of a host (4)
#   --slices=N              (1); more than one are joined by the data-centre network along mesh.data
#   --spot                  nodes that can be taken away
#   --service-account=NAME  Kubernetes service account that may write to the bucket (default)
#   --restarts=N            how often to begin again after a preemption or failure (100)
#   --dry-run               print the JobSet and the command, and do nothing
#
# The cluster needs the JobSet controller: github.com/kubernetes-sigs/jobset.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="name image accelerator topology hosts config workdir chips slices service-account restarts"
switches="spot dry-run"
name='' image='' accelerator='' topology='' hosts='' config='' workdir=''
chips=4 slices=1 service_account=default restarts=100 spot='' dry_run=''
parse "$@"
require name image accelerator topology hosts config workdir
require_number hosts chips slices restarts
require_bucket
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--name must be small letters, digits and dashes, got $name"

# A string of JSON, which YAML understands.
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t}
  [[ $text != *[[:cntrl:]]* ]] || die "a control character in $text"
  printf '"%s"' "$text"
}

arguments() {
  local argument
  for argument in "--config=$config" "--workdir=$workdir" "${rest[@]}"; do
    printf '              - %s\n' "$(quoted "${argument//\$(/\$\$(}")" # Kubernetes would put variables for $(NAME)
  done
}

# Status 2 means settings that cannot work, or a run that diverged: to begin again would not help.
jobset() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [2]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            serviceAccountName: $(quoted "$service_account")
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(quoted "$accelerator")
              cloud.google.com/gke-tpu-topology: $(quoted "$topology")
${spot:+              cloud.google.com/gke-spot: \"true\"
}            containers:
            - name: train
              image: $(quoted "$image")
              args:
$(arguments)
              ports:
              - containerPort: 8471
              - containerPort: 8080
              - containerPort: 8482
              resources:
                limits:
                  google.com/tpu: $chips
END
}

manifest=$(jobset)
[[ -z $dry_run ]] || printf '%s\n' "$manifest"
run kubectl apply --filename=- <<<"$manifest"
cat >&2 <<END
  watch:         kubectl get jobset,pods --selector=jobset.sigs.k8s.io/jobset-name=$name
  what it says:  kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
  end it:        kubectl delete jobset $name (each host saves a checkpoint first)
END
