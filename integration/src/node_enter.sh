# Runs a command in a node: joins the node's cgroups and namespaces, then becomes the command.
#
# Arguments: HOLDER-PID PID-FILE N CGROUP-PROCS-FILE*N COMMAND...
# A PID-FILE other than "-" makes the command a daemon's: its pid, which no step below changes, is written
# there, and descriptors inherited from whoever called are closed, because a daemon would hand them on to
# every container, where CRIU then meets files it cannot name.
set -euo pipefail
holder=$1 pid_file=$2 count=$3
shift 3
for procs in "${@:1:count}"; do echo $$ >"$procs"; done
shift "$count"
if [[ $pid_file != - ]]; then
    for fd in /proc/$$/fd/*; do
        fd=${fd##*/}
        if ((fd > 2)); then eval "exec $fd>&-"; fi
    done
    echo $$ >"$pid_file.new"
    mv "$pid_file.new" "$pid_file"
fi
case $holder in
    /*) exec nsenter --net="$holder" -- unshare --mount --cgroup --propagation private -- "$@" ;;
    *) exec nsenter --target "$holder" --net --mount --cgroup -- "$@" ;;
esac
