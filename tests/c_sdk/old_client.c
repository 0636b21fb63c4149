/* A client as firmware has had it for years: no SDK, no Content-Type, HTTP/1.0, one write or two.
 *
 *     old_client PORT BODY [apart]      `apart`: the body leaves in a packet of its own, a moment after the headers */
#define _POSIX_C_SOURCE 200809L

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0), no_delay = 1;
    struct sockaddr_in address = {0};
    struct timespec moment = {0, 100 * 1000000L};
    char text[1024];
    ssize_t count;

    if (argc < 3)
        return 2;
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)atoi(argv[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
        return 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &no_delay, sizeof no_delay);

    snprintf(text, sizeof text, "POST / HTTP/1.0\r\nContent-Length: %u\r\n\r\n", (unsigned)strlen(argv[2]));
    if (argc > 3) {
        send(fd, text, strlen(text), 0);
        nanosleep(&moment, NULL);
        send(fd, argv[2], strlen(argv[2]), 0);
    } else {
        strncat(text, argv[2], sizeof text - strlen(text) - 1);
        send(fd, text, strlen(text), 0);
    }
    while ((count = recv(fd, text, sizeof text, 0)) > 0)
        fwrite(text, 1, (size_t)count, stdout);
    close(fd);
    return count == 0 ? 0 : 1;
}
