/* A system whose poll() promised too much: each second send() and recv() finds that the socket is not ready after all.
 * Linked with --wrap=send and --wrap=recv. */
#include <errno.h>
#include <sys/socket.h>
#include <sys/types.h>

ssize_t __real_send(int fd, const void *data, size_t length, int flags);
ssize_t __wrap_send(int fd, const void *data, size_t length, int flags);
ssize_t __real_recv(int fd, void *buffer, size_t size, int flags);
ssize_t __wrap_recv(int fd, void *buffer, size_t size, int flags);

static unsigned calls;

static int not_yet(void)
{
    static const int errors[] = {EAGAIN, EINTR};

    if (++calls % 2 == 0)
        return 0;
    errno = errors[calls / 2 % 2];
    return 1;
}

ssize_t __wrap_send(int fd, const void *data, size_t length, int flags)
{
    return not_yet() ? -1 : __real_send(fd, data, length, flags);
}

ssize_t __wrap_recv(int fd, void *buffer, size_t size, int flags)
{
    return not_yet() ? -1 : __real_recv(fd, buffer, size, flags);
}
