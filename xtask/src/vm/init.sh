#!/bin/sh
# The first process in the virtual machine: makes a small system of the initramfs, says what the
# kernel can do, runs the test programs and switches off. Lines that begin with `@@fault` are for
# xtask; whatever else is printed is for people.

/bin/busybox mkdir -p /proc /sys /dev /tmp /run /root /var/run
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TMPDIR=/tmp TERM=dumb RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
# In memory as all of it; a mount would hide a checkout that lies there.
chmod 1777 /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
ln -s /proc/self/fd /dev/fd
hostname fault-vm

# In an order in which each finds what it builds on; one that this kernel lacks is not in the folder.
for module in /modules/*.ko; do
    insmod "$module" || echo "@@fault broken module ${module##*/}"
done
ip link set lo up

FAULT_VM_KERNEL=$(uname -r)
FAULT_VM_FEATURES=

# has NAME COMMAND…: whether the kernel has a feature, by trying it.
has() {
    feature=$1
    shift
    if "$@" >/tmp/tried 2>&1; then
        FAULT_VM_FEATURES=$FAULT_VM_FEATURES${FAULT_VM_FEATURES:+,}$feature
    else
        echo "no $feature: $(tr '\n' ' ' </tmp/tried)"
    fi
}

# since MAJOR MINOR: what can't be tried from a shell is known by the kernel's version.
since() {
    major=${FAULT_VM_KERNEL%%.*}
    minor=${FAULT_VM_KERNEL#*.}
    minor=${minor%%[!0-9]*}
    [ "$major" -gt "$1" ] || { [ "$major" -eq "$1" ] && [ "$minor" -ge "$2" ]; }
}

link() {
    ip link add probe0 type "$1" && ip link delete probe0
}

vlan() {
    ip link add link probe1 name probe0 type vlan id 7 && ip link delete probe0
}

qdisc() {
    tc qdisc add dev probe1 "$@" && tc qdisc delete dev probe1 "$1"
}

filter() {
    tc qdisc add dev probe1 root handle 1: prio || return
    tc filter add dev probe1 parent 1: protocol all prio 1 "$@"
    result=$?
    tc qdisc delete dev probe1 root
    return $result
}

tap() {
    ip tuntap add mode tap name probe0 && ip tuntap delete mode tap name probe0
}

has btf test -r /sys/kernel/btf/vmlinux
has cgroup2 test -r /sys/fs/cgroup/cgroup.controllers
has bpffs test -d /sys/fs/bpf
has ipv6 test -d /proc/sys/net/ipv6
has veth link veth
has ifb link ifb
has dummy link dummy
has bridge link bridge
has tap tap
ip link add probe1 type dummy
has vlan vlan
has clsact qdisc clsact
has fq qdisc root fq
has netem qdisc root netem delay 1ms
has prio qdisc root prio
has htb qdisc root htb
has tbf qdisc root tbf rate 1mbit burst 32k latency 1s
has fq_codel qdisc root fq_codel
has fw filter handle 1 fw classid 1:1
has u32 filter u32 match u32 0 0 classid 1:1
has flower filter flower classid 1:1
has matchall filter matchall classid 1:1
has mirred filter matchall action mirred egress redirect dev lo
ip link delete probe1
has ringbuf since 5 8
has sk_lookup since 5 9
has atomic_fetch since 5 12
has bpf_timer since 5 15
has bpf_loop since 5 17
has tcx since 6 6
has netkit since 6 7

export FAULT_VM_KERNEL FAULT_VM_FEATURES
echo "@@fault kernel $FAULT_VM_KERNEL"
echo "@@fault features $FAULT_VM_FEATURES"

ulimit -n 65536
ulimit -l unlimited
while read -r suite; do
    echo "@@fault start $suite"
    # shellcheck disable=SC2046 # One argument for each word is what is wanted.
    "/tests/$suite" $(cat /tests/arguments) </dev/null 2>&1
    echo "@@fault end $suite $?"
done </tests/list
echo "@@fault done"
poweroff -f
