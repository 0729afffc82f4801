# Runs as the first process of a node, already in the node's network, mount and cgroup namespaces:
# gives the mount namespace the node's own view of /run and of the cgroup hierarchies, says "ready"
# on stdout, and stays as the process that holds the namespaces.
#
# Arguments: HOSTS-FILE HIERARCHY...   where HIERARCHY is MOUNTPOINT=v2 or MOUNTPOINT=v1:OPTIONS.
set -euo pipefail
hosts=$1
shift

# Fresh mounts of the same hierarchies show the cgroup namespace's root as "/". The old mounts have to go
# first: whoever reads mountinfo (containerd, libcontainer, CRIU) would otherwise find the machine's.
links=()
if [[ -d /sys/fs/cgroup ]]; then
    for link in /sys/fs/cgroup/*; do
        if [[ -L $link ]]; then links+=("$(readlink "$link")" "$link"); fi
    done
    umount -R /sys/fs/cgroup
fi
if [[ " $* " != *" /sys/fs/cgroup=v2 "* ]]; then
    mount -t tmpfs -o mode=755,size=64k cgroup /sys/fs/cgroup
fi
for hierarchy in "$@"; do
    point=${hierarchy%%=*}
    kind=${hierarchy#*=}
    mkdir -p "$point"
    if [[ $kind == v2 ]]; then
        mount -t cgroup2 cgroup2 "$point"
        # A unified cgroup that holds processes cannot hand controllers to its children, and the runtime
        # makes the containers' cgroups beside this one.
        mkdir -p "$point/init"
        echo $$ >"$point/init/cgroup.procs"
    else
        mount -t cgroup -o "${kind#v1:}" cgroup "$point"
    fi
done
for ((i = 0; i < ${#links[@]}; i += 2)); do ln -s "${links[i]}" "${links[i + 1]}"; done

# Network namespaces by name are the machine's and would be kept alive by the copies of their mounts.
if mountpoint -q /run/netns; then umount -R /run/netns; fi
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock /run/tmp /run/containerd
chmod 1777 /run/tmp
# Not from the disk: who reads a new file first causes its access time to be written there, and would have written to
# disk by what the tests of migrations count.
cp "$hosts" /run/hosts
mount --bind /run/hosts /etc/hosts

echo ready
exec sleep infinity </dev/null >/dev/null 2>&1
