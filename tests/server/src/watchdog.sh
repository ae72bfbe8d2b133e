# Makes a directory under the first of its arguments that allows it, prints its path, and removes
# it, with the processes that use it, when standard input ends: however the writer ended.
#
# Each line of input replaces the list of those processes; the first is the leader of its group.

trap '' HUP INT QUIT TERM PIPE
umask 077

for base; do
    dir=$(mktemp -d "$base/pushpop-XXXXXX" 2>/dev/null) && break
done
[ -n "$dir" ] || exit 1
printf '%s\n' "$dir"
exec >/dev/null 2>&1

pids=
while read -r line; do pids=$line; done

# A zombie is not alive: where no init reaps, it stays one for ever.
alive() {
    kill -s 0 -- "-$1" && case $(cat "/proc/$1/stat") in *') Z '*) false ;; esac
}

if [ -n "$pids" ]; then
    set -- $pids
    # QUIT is the server's immediate shutdown; CONT, after it, is for a paused server. The group
    # has to wait for its leader's end, as initdb's children end in order only without a signal.
    kill -s QUIT -- "$@"
    kill -s CONT -- "$@"
    tries=0
    while [ "$tries" -lt 100 ] && alive "$1"; do
        sleep 0.1
        tries=$((tries + 1))
    done
    if kill -s 0 -- "-$1"; then kill -s KILL -- "-$1" "$@"; fi
fi

# A killed server leaves its lock file, and in line 7 the key and id of its System V segment.
set -- $(sed -n 7p "$dir/data/postmaster.pid")
[ $# -eq 2 ] && ipcrm -m "$2"

# What was killed may still be writing its last file.
tries=0
until rm -rf -- "$dir" || [ "$tries" -ge 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
